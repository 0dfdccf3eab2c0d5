"""The tests of chatserver: real sockets, real databases; read helpers.py and sockets.py first."""
