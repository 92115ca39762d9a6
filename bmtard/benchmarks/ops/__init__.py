"""One file an op: ``OPS`` lists what it defines."""
