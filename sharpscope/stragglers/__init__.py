"""From measured numbers to decisions: which layers co-move with the OOD error, which alpha to ship."""
