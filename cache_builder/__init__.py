"""Stage 1: run the teacher once, write the cache, look after it."""
