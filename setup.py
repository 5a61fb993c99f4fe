"""Packages, dependencies and the import name of `kernels/`."""

from pathlib import Path

from setuptools import setup

setup(
    name="fasttrain",
    version="0.1.0",
    description="Turn a frozen image encoder into a video encoder: Co-Settle, trained in minutes.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "fasttrain",
        "fasttrain.data",
        "fasttrain.evaluation",
        "fasttrain.recipes",
        "fasttrain.tools",
        "fasttrain_kernels",
    ],
    # The plain name `kernels` belongs to a Hugging Face package that transformers imports.
    package_dir={"fasttrain": "fasttrain", "fasttrain.recipes": "recipes", "fasttrain_kernels": "kernels"},
    package_data={
        "fasttrain": ["py.typed"],
        "fasttrain.recipes": ["*.yaml", "schema.json"],
        "fasttrain_kernels": ["py.typed", "README.md"],
    },
    install_requires=[
        "torch>=2.11",
        "torchvision",  # imported by timm
        "triton>=3.6; platform_system == 'Linux'",
        "nvidia-dali-cuda120>=2.4; platform_system == 'Linux'",
        "timm>=1.0.20",
        "av>=17.1",  # video on machines without NVDEC
        "filelock>=3.16",
        "numpy>=1.26",
        "pyyaml>=6",
        "pydantic>=2.11",
        "filelock>=3.16",
        "rich>=13",
        "safetensors>=0.4",
        "huggingface_hub>=0.30",
        "pillow>=10.4",
        "matplotlib>=3.8",
        "scipy>=1.11",  # JHMDB joint positions are .mat files; L-BFGS of the linear probes
        "tensorboard>=2.16",
    ],
    extras_require={
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["fasttrain = fasttrain.__main__:main"]},
)
