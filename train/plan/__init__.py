"""What a run needs on devices that are not at hand; it loads no data."""
