"""Operations on arrays, each with a readable reference. Knows no nnx, no mesh names and no model."""
