"""The paper's tables against ours."""
