"""The wheels of `make dist`, installed where nothing else is (marker `wheels`)."""
