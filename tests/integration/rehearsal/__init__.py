"""Every chat template and vocabulary of the pinned archive, on files with random weights (`make test-rehearsal`)."""
