"""What the claims of papers are tried with: small models, synthetic strings of digits."""
