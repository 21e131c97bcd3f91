//! The two values of `[data]` that are written in more than one way: an image size and a number of bytes.

use std::fmt;

use serde::de::{self, SeqAccess, Visitor};
use serde::ser::SerializeSeq;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Height and width of an image in pixels: `28` (square) or `[height, width]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSize {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl ImageSize {
    /// A square image.
    pub fn square(side: usize) -> ImageSize {
        ImageSize { height: side, width: side }
    }
}

impl fmt::Display for ImageSize {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}×{}", self.height, self.width)
    }
}

impl Serialize for ImageSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.height == self.width {
            return serializer.serialize_u64(self.height as u64);
        }
        let mut seq = serializer.serialize_seq(Some(2))?;
        seq.serialize_element(&self.height)?;
        seq.serialize_element(&self.width)?;
        seq.end()
    }
}

impl<'de> Deserialize<'de> for ImageSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ImageSize, D::Error> {
        struct SizeVisitor;
        impl<'de> Visitor<'de> for SizeVisitor {
            type Value = ImageSize;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a number of pixels such as 32, or [height, width]")
            }
            fn visit_u64<E: de::Error>(self, v: u64) -> Result<ImageSize, E> {
                let side = usize::try_from(v).map_err(|_| E::invalid_value(de::Unexpected::Unsigned(v), &self))?;
                Ok(ImageSize::square(side))
            }
            fn visit_i64<E: de::Error>(self, v: i64) -> Result<ImageSize, E> {
                let v = u64::try_from(v).map_err(|_| E::invalid_value(de::Unexpected::Signed(v), &self))?;
                self.visit_u64(v)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<ImageSize, A::Error> {
                let height = seq.next_element()?.ok_or_else(|| de::Error::invalid_length(0, &self))?;
                let width = seq.next_element()?.ok_or_else(|| de::Error::invalid_length(1, &self))?;
                if seq.next_element::<de::IgnoredAny>()?.is_some() {
                    return Err(de::Error::invalid_length(3, &self));
                }
                Ok(ImageSize { height, width })
            }
        }
        deserializer.deserialize_any(SizeVisitor)
    }
}

/// A number of bytes: `1048576`, `"500MB"`, `"8GiB"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// Largest unit first, so that [`ByteSize`]'s `Display` finds the shortest exact form.
const UNITS: [(&str, u64); 8] = [
    ("TiB", 1 << 40),
    ("TB", 1_000_000_000_000),
    ("GiB", 1 << 30),
    ("GB", 1_000_000_000),
    ("MiB", 1 << 20),
    ("MB", 1_000_000),
    ("KiB", 1 << 10),
    ("kB", 1_000),
];

impl ByteSize {
    /// Reads `"8GiB"`, `"8 GiB"`, `"1.5gb"`, `"4096"`; `None` if it is none of those or does not fit 63 bits.
    pub fn parse(text: &str) -> Option<ByteSize> {
        let text = text.trim();
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = (&text[..split], text[split..].trim());
        let scale = match unit {
            "" | "B" | "b" => 1,
            _ => UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit))?.1,
        };
        // Whole numbers stay exact; only "1.5GiB" goes through a float.
        let bytes = match number.parse::<u64>() {
            Ok(n) => n.checked_mul(scale)?,
            Err(_) => {
                let bytes = number.parse::<f64>().ok()? * scale as f64;
                if bytes >= i64::MAX as f64 {
                    return None;
                }
                bytes as u64
            }
        };
        (bytes <= i64::MAX as u64).then_some(ByteSize(bytes))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match UNITS.iter().find(|(_, scale)| self.0 > 0 && self.0.is_multiple_of(*scale)) {
            Some((name, scale)) => write!(f, "{}{name}", self.0 / scale),
            None => write!(f, "{}B", self.0),
        }
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ByteSize, D::Error> {
        struct BytesVisitor;
        impl Visitor<'_> for BytesVisitor {
            type Value = ByteSize;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a number of bytes such as 1048576, \"500MB\" or \"8GiB\"")
            }
            fn visit_u64<E: de::Error>(self, v: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(v))
            }
            fn visit_i64<E: de::Error>(self, v: i64) -> Result<ByteSize, E> {
                u64::try_from(v).map(ByteSize).map_err(|_| E::invalid_value(de::Unexpected::Signed(v), &self))
            }
            fn visit_str<E: de::Error>(self, v: &str) -> Result<ByteSize, E> {
                ByteSize::parse(v).ok_or_else(|| E::invalid_value(de::Unexpected::Str(v), &self))
            }
        }
        deserializer.deserialize_any(BytesVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_and_written_exactly() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("17B", 17),
            ("8GiB", 8 << 30),
            ("8 gib", 8 << 30),
            ("500MB", 500_000_000),
            ("1.5KiB", 1536),
            ("3TB", 3_000_000_000_000),
        ] {
            assert_eq!(ByteSize::parse(text), Some(ByteSize(bytes)), "{text}");
            assert_eq!(ByteSize::parse(&ByteSize(bytes).to_string()), Some(ByteSize(bytes)), "{text}");
        }
        for text in ["", "GiB", "-1", "1.2.3GB", "8 bananas", "1e3", "99999999TiB", "99999999.5TiB"] {
            assert_eq!(ByteSize::parse(text), None, "{text}");
        }
        assert_eq!(ByteSize(8 << 30).to_string(), "8GiB");
        assert_eq!(ByteSize(1_500_000).to_string(), "1500kB");
    }
}
