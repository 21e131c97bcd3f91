//! Is a JPEG file whole? Decoders fill what is missing with grey and say nothing.

/// The start-of-image marker and the first byte of the next.
pub(super) const START: &[u8] = &[0xff, 0xd8, 0xff];

/// Walks the markers (ITU-T T.81, annex B) and says whether the end-of-image marker is reached.
pub(super) fn is_whole(bytes: &[u8]) -> bool {
    let mut at = 2;
    loop {
        // To the next marker: 0xff and a byte that is neither a stuffed zero, a restart marker nor fill. Inside a scan
        // that skips the coded data; between segments there is nothing to skip.
        let marker = loop {
            match bytes.get(at..at + 2) {
                Some([0xff, marker]) if !matches!(marker, 0x00 | 0x01 | 0xd0..=0xd7 | 0xff) => break *marker,
                Some(_) => at += 1,
                None => return false,
            }
        };
        at += 2;
        if marker == 0xd9 {
            return true;
        }
        // Every other marker starts a segment, whose length counts its own two bytes.
        match bytes.get(at..at + 2) {
            Some([high, low]) => at += usize::from(u16::from_be_bytes([*high, *low])),
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use image::codecs::jpeg::JpegEncoder;

    use super::*;

    #[test]
    fn a_jpeg_cut_anywhere_is_not_whole() {
        let pixels: Vec<u8> = (0..40 * 30 * 3).map(|i| (i * 7 % 256) as u8).collect();
        let mut bytes = Vec::new();
        JpegEncoder::new_with_quality(&mut bytes, 90).encode(&pixels, 40, 30, image::ExtendedColorType::Rgb8).unwrap();
        assert!(is_whole(&bytes));
        for cut in 0..bytes.len() {
            assert!(!is_whole(&bytes[..cut]), "cut at {cut} of {}", bytes.len());
        }
        // Bytes after the end are common (some cameras) and harmless.
        assert!(is_whole(&[bytes.as_slice(), b"trailer"].concat()));
        // An embedded thumbnail has an end marker of its own, inside a segment.
        let mut with_thumbnail = vec![0xff, 0xd8, 0xff, 0xe1];
        with_thumbnail.extend(((bytes.len() + 2) as u16).to_be_bytes());
        with_thumbnail.extend(&bytes);
        assert!(!is_whole(&with_thumbnail));
        with_thumbnail.extend(&bytes[2..]);
        assert!(is_whole(&with_thumbnail));
    }
}
