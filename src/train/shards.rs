//! The parts of a batch, and which rank computes which.

use super::TrainConfig;
use crate::config::OutOfRange;
use serde::de::{self, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::ops::Range;

/// Into how many parts a batch is divided: `"auto"` or a power of two.
///
/// Gradients are added along a binary tree over the parts, whoever computes them, so that a fixed number gives the same bits at every number
/// of ranks that divides it. With `"auto"` there are as many parts as ranks: images and noise are the same at any number of ranks, sums are
/// not, in their last bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Shards {
    /// As many as there are ranks.
    #[default]
    Auto,
    /// So many; each rank computes several one after another where there are fewer ranks.
    Fixed(usize),
}

impl fmt::Display for Shards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Shards::Auto => f.write_str("auto"),
            Shards::Fixed(number) => number.fmt(f),
        }
    }
}

impl Serialize for Shards {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Shards::Auto => serializer.serialize_str("auto"),
            Shards::Fixed(number) => serializer.serialize_u64(*number as u64),
        }
    }
}

impl<'de> Deserialize<'de> for Shards {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Shards, D::Error> {
        struct ShardsVisitor;
        impl Visitor<'_> for ShardsVisitor {
            type Value = Shards;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"auto\" or a power of two")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Shards, E> {
                match text {
                    "auto" => Ok(Shards::Auto),
                    _ => Err(E::invalid_value(Unexpected::Str(text), &self)),
                }
            }
            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Shards, E> {
                let value =
                    usize::try_from(number).map_err(|_| E::invalid_value(Unexpected::Unsigned(number), &self))?;
                Ok(Shards::Fixed(value))
            }
            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Shards, E> {
                let value = u64::try_from(number).map_err(|_| E::invalid_value(Unexpected::Signed(number), &self))?;
                self.visit_u64(value)
            }
        }
        deserializer.deserialize_any(ShardsVisitor)
    }
}

/// A rank's part of every batch: a contiguous run of shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Images of a shard.
    pub shard: usize,
    /// Shards of this rank: a power of two, or 1.
    pub shards: usize,
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
}

impl Share {
    /// The part of rank `rank` of `world_size`.
    ///
    /// # Errors
    /// A batch, or shards, that so many ranks cannot divide among them.
    pub fn new(config: &TrainConfig, rank: usize, world_size: usize) -> Result<Share, OutOfRange> {
        let ranks = ranks(world_size);
        let shards = match config.shards {
            Shards::Auto => world_size,
            Shards::Fixed(shards) => {
                let fits = shards.is_multiple_of(world_size);
                let why = "each rank computes as many shards as the others; with \"auto\" there is one for each rank";
                OutOfRange::check(fits, "train.shards", shards, format!("a multiple of the {ranks}"), why)?;
                shards
            }
        };
        let why = "each shard has as many images as the others";
        let expected = match config.shards {
            Shards::Auto => format!("a multiple of the {ranks}"),
            Shards::Fixed(shards) => format!("a multiple of train.shards = {shards}"),
        };
        let fits = shards > 0 && config.batch.is_multiple_of(shards);
        OutOfRange::check(fits, "train.batch", config.batch, expected, why)?;
        Ok(Share { shard: config.batch / shards, shards: shards / world_size, rank, world_size })
    }

    /// The only rank's.
    ///
    /// # Errors
    /// As [`Share::new`].
    pub fn solo(config: &TrainConfig) -> Result<Share, OutOfRange> {
        Share::new(config, 0, 1)
    }

    /// Images of this rank in each batch.
    pub fn images(&self) -> usize {
        self.shard * self.shards
    }

    /// Their places in the batch.
    pub fn places(&self) -> Range<usize> {
        let first = self.rank * self.images();
        first..first + self.images()
    }

    /// Sums of gradients that are kept while the shards are computed, beside the gradients themselves: log2 of their number.
    pub fn partial_sums(&self) -> usize {
        self.shards.ilog2() as usize
    }
}

/// So many ranks, in words.
pub(super) fn ranks(number: usize) -> String {
    if number == 1 { "1 rank".to_string() } else { format!("{number} ranks") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(batch: usize, shards: Shards) -> TrainConfig {
        TrainConfig { batch, shards, ..TrainConfig::default() }
    }

    #[test]
    fn the_parts_make_up_the_batch() {
        for (batch, shards) in [(24, Shards::Auto), (24, Shards::Fixed(8)), (128, Shards::Fixed(16)), (7, Shards::Auto)]
        {
            for world_size in 1..=24 {
                let config = config(batch, shards);
                let Ok(first) = Share::new(&config, 0, world_size) else { continue };
                let mut end = 0;
                for rank in 0..world_size {
                    let share = Share::new(&config, rank, world_size).unwrap();
                    assert_eq!(share.places().start, end);
                    end = share.places().end;
                    assert_eq!((share.shard, share.shards), (first.shard, first.shards));
                    assert!(share.shards.is_power_of_two() && 1 << share.partial_sums() == share.shards);
                }
                assert_eq!(end, batch);
            }
        }
    }

    #[test]
    fn worlds_that_divide_nothing_are_refused() {
        let refused = |batch, shards, world_size| {
            Share::new(&config(batch, shards), 0, world_size).map_err(|e| (e.key.clone(), e.to_string()))
        };
        assert!(refused(24, Shards::Auto, 3).is_ok());
        let (key, text) = refused(25, Shards::Auto, 2).unwrap_err();
        assert!(key == "train.batch" && text.contains("25") && text.contains("a multiple of the 2 ranks"), "{text}");
        let (key, text) = refused(24, Shards::Fixed(4), 8).unwrap_err();
        assert!(key == "train.shards" && text.contains("4") && text.contains("a multiple of the 8 ranks"), "{text}");
        assert_eq!(refused(24, Shards::Fixed(8), 3).unwrap_err().0, "train.shards");
        let (key, text) = refused(20, Shards::Fixed(8), 1).unwrap_err();
        assert!(key == "train.batch" && text.contains("train.shards = 8"), "{text}");
    }

    #[test]
    fn shards_are_written_as_they_are_read() {
        for (text, shards) in [("shards = \"auto\"", Shards::Auto), ("shards = 8", Shards::Fixed(8))] {
            let config: TrainConfig = toml::from_str(text).unwrap();
            assert_eq!(config.shards, shards);
            assert_eq!(toml::from_str::<TrainConfig>(&toml::to_string(&config).unwrap()).unwrap(), config);
        }
        for text in ["shards = \"all\"", "shards = -1", "shards = 1.5"] {
            let refused = toml::from_str::<TrainConfig>(text).unwrap_err().to_string();
            assert!(refused.contains("\"auto\" or a power of two"), "{refused}");
        }
    }
}
