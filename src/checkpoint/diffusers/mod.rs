//! diffusers directories (being written)
