"""Adds the repository's configs/ to the wheel as package data; everything else is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

CODE = [name for name in find_namespace_packages(include=["grpo_mega", "grpo_mega.*"]) if "__pycache__" not in name]

setup(
    packages=[*CODE, "grpo_mega.configs"],
    package_dir={"grpo_mega.configs": "configs"},
    package_data={
        "grpo_mega": ["py.typed"],
        "grpo_mega.observe.report": ["page/*"],
        "grpo_mega.configs": ["**/*.yaml", "**/*.json"],
    },
)
