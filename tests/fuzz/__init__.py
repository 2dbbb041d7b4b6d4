"""Damaged and hostile inputs for every reader: each is read, or refused in one sentence, within limits."""
