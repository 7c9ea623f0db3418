"""The controllers: one file each, one contract."""
