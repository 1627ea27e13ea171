"""One file per op: raw op, fake, autograd."""
