"""Stage 2: train a student, with or without a cache."""
