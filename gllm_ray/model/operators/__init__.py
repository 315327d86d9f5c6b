"""Operators in C++ for the CPU, built where they are first needed."""
