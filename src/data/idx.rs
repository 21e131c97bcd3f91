//! IDX, the format of MNIST and its relatives: `00 00 08 03`, three big-endian u32 (count, rows, columns), pixels.

use super::Fault;
use super::array::ArrayHeader;

const HELP: &str = "the images are in the file whose name has \"images-idx3-ubyte\"";

/// Reads the header from the first bytes of a file.
pub(super) fn parse(head: &[u8]) -> Result<ArrayHeader, Fault> {
    let expected = "the bytes 00 00 08 03 (u8, three dimensions)";
    let magic =
        |found: String| Fault::Magic { format: "an IDX image file", expected: expected.to_string(), found, help: HELP };
    let Some((&[zero0, zero1, dtype, rank], rest)) = head.split_first_chunk::<4>() else {
        return Err(magic(format!("{} bytes in all", head.len())));
    };
    if [zero0, zero1] != [0, 0] {
        return Err(magic(format!("{zero0:02x} {zero1:02x} {dtype:02x} {rank:02x}")));
    }
    let name = match dtype {
        0x08 => None,
        0x09 => Some("i8"),
        0x0b => Some("i16"),
        0x0c => Some("i32"),
        0x0d => Some("f32"),
        0x0e => Some("f64"),
        _ => return Err(magic(format!("{zero0:02x} {zero1:02x} {dtype:02x} {rank:02x}"))),
    };
    if let Some(name) = name {
        return Err(Fault::Dtype {
            found: format!("{name} (IDX code {dtype:02x})"),
            expected: "unsigned bytes",
            help: HELP,
        });
    }
    if rank == 1 {
        return Err(magic("00 00 08 01 (this is a file of labels)".into()));
    }
    if rank != 3 {
        return Err(magic(format!("00 00 08 {rank:02x} ({rank} dimensions)")));
    }
    let Some((dims, _)) = rest.split_first_chunk::<12>() else {
        return Err(Fault::Length { expected: 16, found: head.len() as u64 });
    };
    let dim = |i: usize| u64::from(u32::from_be_bytes([dims[i], dims[i + 1], dims[i + 2], dims[i + 3]]));
    ArrayHeader::new(&[dim(0), dim(4), dim(8)], 16)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(dims: [u32; 3]) -> Vec<u8> {
        let mut bytes = vec![0, 0, 8, 3];
        dims.iter().for_each(|d| bytes.extend(d.to_be_bytes()));
        bytes
    }

    #[test]
    fn a_header_gives_the_shape() {
        let found = parse(&header([60_000, 28, 20])).unwrap();
        assert_eq!(found, ArrayHeader { count: 60_000, shape: [28, 20, 1], offset: 16, bytes: 60_000 * 28 * 20 });
        assert_eq!(found.check_length(16), Err(Fault::Length { expected: 33_600_016, found: 16 }));
    }

    #[test]
    fn other_files_are_told_apart() {
        assert!(parse(&[0, 0, 8, 1, 0, 0, 0, 9]).unwrap_err().to_string().contains("a file of labels"));
        assert!(matches!(parse(&[0, 0, 0x0d, 3, 0, 0, 0, 9]), Err(Fault::Dtype { .. })));
        assert!(matches!(parse(&[0x89, b'P', b'N', b'G']), Err(Fault::Magic { .. })));
        assert!(matches!(parse(&[0, 0, 8]), Err(Fault::Magic { .. })));
        assert!(matches!(parse(&[]), Err(Fault::Magic { .. })));
        assert!(matches!(parse(&[0, 0, 8, 4, 0, 0, 0, 1]), Err(Fault::Magic { .. })));
        assert_eq!(parse(&header([1, 2, 3])[..9]), Err(Fault::Length { expected: 16, found: 9 }));
        assert!(matches!(parse(&header([0, 28, 28])), Err(Fault::Empty { .. })));
        assert!(matches!(parse(&header([5, 28, 0])), Err(Fault::Shape { .. })));
        assert!(matches!(parse(&header([u32::MAX; 3])), Err(Fault::Claim { .. })));
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_header_or_an_error(tail in prop::collection::vec(any::<u8>(), 0..40), real in any::<bool>()) {
            let mut bytes = if real { vec![0, 0, 8, 3] } else { vec![] };
            bytes.extend(tail);
            if let Ok(header) = parse(&bytes) {
                let [h, w, c] = header.shape;
                prop_assert_eq!(header.bytes as u128, header.count as u128 * h as u128 * w as u128 * c as u128);
                prop_assert_eq!(header.offset, 16);
            }
        }
    }
}
