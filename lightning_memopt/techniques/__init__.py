"""The techniques as plain functions and context managers on an `nn.Module`. No Lightning import."""
