"""Search stages over a SearchProblem, ask/tell, knowing nothing of models."""
