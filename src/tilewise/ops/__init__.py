"""The operators, one package each: what is promised, the reference, the implementations."""
