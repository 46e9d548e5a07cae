"""The ledger of usage: what each request used, kept in a file, and summed up."""
