//! What the product embeds.
