//! NumPy's `.npy`: `\x93NUMPY`, a version, the length of a Python dictionary, the dictionary, the elements.
//!
//! The format is numpy.lib.format's, versions 1.0 to 3.0.

use super::Fault;
use super::array::{ArrayHeader, MAX_HEADER};

pub(super) const MAGIC: &[u8] = b"\x93NUMPY";
const HELP: &str = "write it with numpy.save(path, x)";

/// Reads the header of an array of u8 images from the first bytes of a file.
pub(super) fn parse(head: &[u8]) -> Result<ArrayHeader, Fault> {
    let header = npy_header(head)?;
    if !matches!(header.descr.as_str(), "|u1" | "<u1" | ">u1" | "=u1" | "u1") {
        let help = "convert first, for example (x * 255).round().astype(\"uint8\") for floats in 0 to 1";
        return Err(Fault::Dtype { found: header.descr, expected: "unsigned bytes", help });
    }
    if header.fortran_order {
        return Err(Fault::FortranOrder);
    }
    ArrayHeader::new(&header.shape, header.offset)
}

/// What the header of a `.npy` file says, whatever its elements are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NpyHeader {
    /// The type of the elements as NumPy writes it: `|u1`, `<f4`.
    pub descr: String,
    /// Whether the first index runs fastest.
    pub fortran_order: bool,
    /// The length of each dimension.
    pub shape: Vec<u64>,
    /// Bytes before the first element.
    pub offset: u64,
}

/// Reads the header of a `.npy` file from its first bytes.
///
/// # Errors
/// What is wrong with them.
pub fn npy_header(head: &[u8]) -> Result<NpyHeader, Fault> {
    let Some(rest) = head.strip_prefix(MAGIC) else {
        let found = format!("{:02x?}", &head[..head.len().min(MAGIC.len())]);
        return Err(Fault::Magic { format: "a .npy file", expected: "\\x93NUMPY".into(), found, help: HELP });
    };
    let (length, start) = match *rest {
        [1, _, a, b, ..] => (u64::from(u16::from_le_bytes([a, b])), 10),
        [2 | 3, _, a, b, c, d, ..] => (u64::from(u32::from_le_bytes([a, b, c, d])), 12),
        [1..=3, ..] | [] => return Err(Fault::Length { expected: 12, found: head.len() as u64 }),
        [version, ..] => {
            return Err(Fault::Header { expected: "format version 1, 2 or 3", found: version.to_string(), help: HELP });
        }
    };
    let offset = start + length;
    if offset > MAX_HEADER as u64 {
        let found = format!("a header of {length} bytes");
        return Err(Fault::Header { expected: "a header of at most 65536 bytes", found, help: HELP });
    }
    let Some(dictionary) = head.get(start as usize..offset as usize) else {
        return Err(Fault::Length { expected: offset, found: head.len() as u64 });
    };
    NpyHeader::read(dictionary, offset)
}

impl NpyHeader {
    fn read(text: &[u8], offset: u64) -> Result<NpyHeader, Fault> {
        let mut cursor = Cursor { text, at: 0 };
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        cursor.expect(b'{')?;
        while !cursor.take(b'}') {
            let key = cursor.string()?;
            cursor.expect(b':')?;
            match key.as_str() {
                "descr" if cursor.peek() == Some(b'[') => {
                    return Err(Fault::Dtype {
                        found: "a structured type".into(),
                        expected: "plain numbers",
                        help: "save the field that is the images",
                    });
                }
                "descr" => descr = Some(cursor.string()?),
                "fortran_order" => fortran_order = Some(cursor.boolean()?),
                "shape" => shape = Some(cursor.tuple()?),
                _ => return Err(cursor.fault("one of descr, fortran_order and shape")),
            }
            if !cursor.take(b',') {
                cursor.expect(b'}')?;
                break;
            }
        }
        if cursor.peek().is_some() {
            return Err(cursor.fault("nothing after the dictionary"));
        }
        match (descr, fortran_order, shape) {
            (Some(descr), Some(fortran_order), Some(shape)) => Ok(NpyHeader { descr, fortran_order, shape, offset }),
            _ => Err(cursor.fault("the entries descr, fortran_order and shape")),
        }
    }
}

/// Reads the few Python literals that a header is made of.
struct Cursor<'a> {
    text: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn fault(&self, expected: &'static str) -> Fault {
        let rest = &self.text[self.at.min(self.text.len())..];
        let found = String::from_utf8_lossy(&rest[..rest.len().min(40)]);
        Fault::Header { expected, found: format!("{:?}", found.trim_end()), help: HELP }
    }

    /// The next byte that is not white space.
    fn peek(&mut self) -> Option<u8> {
        while self.text.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }

    fn take(&mut self, byte: u8) -> bool {
        let is = self.peek() == Some(byte);
        self.at += usize::from(is);
        is
    }

    fn expect(&mut self, byte: u8) -> Result<(), Fault> {
        if self.take(byte) { Ok(()) } else { Err(self.fault("a Python dictionary {'descr': …, 'shape': …}")) }
    }

    fn string(&mut self) -> Result<String, Fault> {
        let quote = match self.peek() {
            Some(q @ (b'\'' | b'"')) => q,
            _ => return Err(self.fault("a quoted string")),
        };
        let rest = &self.text[self.at + 1..];
        let Some(length) = rest.iter().position(|b| *b == quote) else {
            return Err(self.fault("a quoted string"));
        };
        self.at += length + 2;
        Ok(String::from_utf8_lossy(&rest[..length]).into_owned())
    }

    fn boolean(&mut self) -> Result<bool, Fault> {
        self.peek();
        for (word, value) in [("True", true), ("False", false)] {
            if self.text[self.at..].starts_with(word.as_bytes()) {
                self.at += word.len();
                return Ok(value);
            }
        }
        Err(self.fault("True or False"))
    }

    fn tuple(&mut self) -> Result<Vec<u64>, Fault> {
        if !self.take(b'(') {
            return Err(self.fault("a tuple of integers"));
        }
        let mut values = Vec::new();
        while !self.take(b')') {
            self.peek();
            let digits = self.text[self.at..].iter().take_while(|b| b.is_ascii_digit()).count();
            let number = std::str::from_utf8(&self.text[self.at..self.at + digits]).ok().and_then(|s| s.parse().ok());
            values.push(number.ok_or_else(|| self.fault("a non-negative integer that fits 64 bits"))?);
            self.at += digits;
            self.take(b'L'); // Python 2 wrote long integers so
            if !self.take(b',') && self.peek() != Some(b')') {
                return Err(self.fault("a comma or a closing parenthesis"));
            }
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A header as numpy writes it: padded with blanks to a multiple of 64, ending in a newline.
    fn header(version: u8, dictionary: &str) -> Vec<u8> {
        let start = if version == 1 { 10 } else { 12 };
        let mut text = dictionary.to_string();
        while !(start + text.len() + 1).is_multiple_of(64) {
            text.push(' ');
        }
        text.push('\n');
        let mut bytes = [MAGIC, &[version, 0]].concat();
        match version {
            1 => bytes.extend((text.len() as u16).to_le_bytes()),
            _ => bytes.extend((text.len() as u32).to_le_bytes()),
        }
        bytes.extend(text.as_bytes());
        bytes
    }

    fn parse_text(dictionary: &str) -> Result<ArrayHeader, Fault> {
        parse(&header(1, dictionary))
    }

    #[test]
    fn headers_of_every_version_and_rank() {
        let text = "{'descr': '|u1', 'fortran_order': False, 'shape': (10, 28, 30, 3), }";
        for version in 1..=3 {
            let bytes = header(version, text);
            let found = parse(&bytes).unwrap();
            let expected = ArrayHeader { count: 10, shape: [28, 30, 3], offset: bytes.len() as u64, bytes: 25_200 };
            assert_eq!(found, expected);
        }
        let grey = parse_text("{\"shape\":(7,5L,6),\"fortran_order\":False,\"descr\":\"<u1\"}").unwrap();
        assert_eq!((grey.count, grey.shape, grey.bytes), (7, [5, 6, 1], 210));
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let array = |descr: &str, order: &str, shape: &str| {
            parse_text(&format!("{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"))
        };
        assert!(matches!(array("'<f4'", "False", "(1, 2, 2)"), Err(Fault::Dtype { found, .. }) if found == "<f4"));
        assert!(matches!(array("[('x', '|u1')]", "False", "(1, 2, 2)"), Err(Fault::Dtype { .. })));
        assert_eq!(array("'|u1'", "True", "(1, 2, 2)"), Err(Fault::FortranOrder));
        for shape in ["()", "(4,)", "(4, 2)", "(1, 2, 2, 4)", "(1, 2, 2, 1, 1)", "(1, 0, 2)"] {
            assert!(matches!(array("'|u1'", "False", shape), Err(Fault::Shape { .. })), "{shape}");
        }
        let planar = array("'|u1'", "False", "(10, 3, 32, 32)").unwrap_err().to_string();
        assert!(planar.contains("transpose(0, 2, 3, 1)"), "{planar}");
        assert!(matches!(array("'|u1'", "False", "(0, 2, 2)"), Err(Fault::Empty { .. })));
        for shape in ["(4294967296, 4294967296, 4294967296)", "(18446744073709551615, 1, 1)"] {
            assert!(matches!(array("'|u1'", "False", shape), Err(Fault::Claim { .. })), "{shape}");
        }
        for shape in ["(99999999999999999999, 1, 1)", "(-1, 2, 2)", "(1 2)", "[1, 2, 2]", "(1.5, 2, 2)", "(1, 2"] {
            assert!(matches!(array("'|u1'", "False", shape), Err(Fault::Header { .. })), "{shape}");
        }
        assert!(matches!(array("'|u1'", "maybe", "(1, 2, 2)"), Err(Fault::Header { .. })));
        assert!(matches!(array("|u1", "False", "(1, 2, 2)"), Err(Fault::Header { .. })));
        assert!(matches!(parse_text("{'descr': '|u1'}"), Err(Fault::Header { .. })));
        assert!(matches!(parse_text("{'colour': '|u1'}"), Err(Fault::Header { .. })));
        assert!(matches!(parse(&header(4, "{}")), Err(Fault::Header { .. })));
        assert!(matches!(parse(b"not numpy"), Err(Fault::Magic { .. })));
        let whole = header(1, "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2, 2), }");
        for cut in 0..whole.len() {
            assert!(parse(&whole[..cut]).is_err(), "cut at {cut}");
        }
        let mut huge = [MAGIC, &[2, 0]].concat();
        huge.extend(u32::MAX.to_le_bytes());
        assert!(matches!(parse(&huge), Err(Fault::Header { .. })));
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_header_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
            let _ = parse(&[MAGIC, &bytes].concat());
            let _ = parse(&header(1, &String::from_utf8_lossy(&bytes)));
        }

        #[test]
        fn a_header_with_one_changed_byte_gives_a_header_or_an_error(at in 0usize..128, value in any::<u8>()) {
            let mut bytes = header(1, "{'descr': '|u1', 'fortran_order': False, 'shape': (12, 28, 28), }");
            let at = at % bytes.len();
            bytes[at] = value;
            if let Ok(header) = parse(&bytes) {
                let [h, w, c] = header.shape;
                prop_assert_eq!(header.bytes as u128, header.count as u128 * h as u128 * w as u128 * c as u128);
            }
        }
    }
}
