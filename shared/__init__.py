"""What building a cache and training from it must agree on."""
