"""Operations under the names by which other packages import them; Triton is not needed."""
