"""How cost grows with rank, tokens, layers, adapted matrices and triplets."""
