"""The tests of chatserver: real processes, real sockets, real databases."""
