"""The wire, without I/O: what clients may say, what they are answered, and how it is framed."""
