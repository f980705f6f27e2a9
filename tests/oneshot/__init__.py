"""Tests of sparsify."""
