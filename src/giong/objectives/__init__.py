"""What moves the numbers: one file per objective, one explicit table."""

from giong.objectives import classify, pretrain, sft

OBJECTIVES = {"sft": sft, "pretrain": pretrain, "classify": classify}
