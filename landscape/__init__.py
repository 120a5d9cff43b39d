"""Matrix-free instruments that measure where training ended up."""
