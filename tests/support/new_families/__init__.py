"""What transformers has that no table covers, tried by the oracle."""
