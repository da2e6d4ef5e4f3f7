"""What pyproject.toml has no place for: the cffi module, and one stable-ABI wheel for every Python from 3.11 on."""

from setuptools import setup

setup(
    cffi_modules=["cshim/build_shim.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
