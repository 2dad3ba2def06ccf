"""The server under a mixed load of many clients, some of which mean harm, for as long as one likes (make soak)."""
