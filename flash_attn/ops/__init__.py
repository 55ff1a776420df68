"""Operations under the names that other libraries import them by."""
