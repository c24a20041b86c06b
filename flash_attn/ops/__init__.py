"""Operations of the FlashAttention-2 package that are not attention."""
