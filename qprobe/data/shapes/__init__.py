"""Shapes that rows have: lists of turns, and questions with choices."""
