"""Whole models on the meta device: what a step of every method launches, moves and computes, and what a card would take for it."""
