"""The engines that lint judges for, one a module."""
