"""What a server costs and gains against the library."""
