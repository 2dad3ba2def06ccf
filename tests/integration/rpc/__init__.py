"""Steering and recording with the model spread over two llama.cpp RPC servers on the loopback (marker `rpc`)."""
