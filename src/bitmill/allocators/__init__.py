"""Allocators: which format each unit of a model gets, so that the sizes fit a budget. One file per allocator."""

from bitmill.allocators.base import ALLOCATORS, Allocator, Choices

__all__ = ["ALLOCATORS", "Allocator", "Choices"]
