"""Fixtures of fine-tuning, which tests on a cluster share."""

from helpers.finetuning import people, pretrained, whole

__all__ = ["people", "pretrained", "whole"]
