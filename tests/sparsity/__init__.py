"""Tests of the pure core of sparse training."""
