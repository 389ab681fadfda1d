"""The estimator fidelity study: every estimator of the path gradient against the exact integral, at one trained point."""
