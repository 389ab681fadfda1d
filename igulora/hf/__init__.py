"""igulora at home in transformers' Trainer; igulora.trainer is where its names are imported from."""
