from tests.numerics.conftest import small_model

__all__ = ["small_model"]
