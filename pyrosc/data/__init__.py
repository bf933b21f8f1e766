"""AnnData in, Counts out, and Cells, the minibatches that programs see. No Pyro here."""
