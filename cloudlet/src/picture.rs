//! Pictures on their way to and from applications: PNG files here, raw pixels there.

use std::io::{self, BufRead, Seek, Write};

/// Side of the pictures that the recogniser takes, and their largest value: as in the data set
/// that it learns from (`resources/data/README.md`).
const DIGIT_SIDE: usize = 8;
const DIGIT_MAX: u64 = 16;
/// Largest picture read, in pixels.
const PIXELS_MAX: u64 = 64 << 20;

/// Why a picture cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No PNG, or a damaged one.
    #[error("this is no PNG picture")]
    Decode(#[from] png::DecodingError),
    /// It could not be written.
    #[error("cannot write the picture")]
    Encode(#[from] png::EncodingError),
    /// Too many or too few pixels.
    #[error(
        "the picture has {width} x {height} pixels; it takes 8 x 8 or more, and {PIXELS_MAX} at most"
    )]
    Size {
        /// Its width.
        width: u32,
        /// Its height.
        height: u32,
    },
    /// The end of the file came early.
    #[error("cannot read the picture")]
    Io(#[from] io::Error),
}

/// Writes `rgb`, three bytes a pixel, row after row, as a PNG.
pub fn write_png(out: impl Write, width: u32, height: u32, rgb: &[u8]) -> Result<(), Error> {
    let mut encoder = png::Encoder::new(out, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.write_header()?.write_image_data(rgb)?;
    Ok(())
}

/// The `WIDTHxHEIGHT` word of an answer whose attachment is a picture of that size.
#[must_use]
pub fn size_in(text: &str, attachment_len: usize) -> Option<(u32, u32)> {
    text.split_whitespace().find_map(|word| {
        let (width, height) = word.split_once('x')?;
        let size: (u32, u32) = (width.parse().ok()?, height.parse().ok()?);
        let len = u64::from(size.0)
            .checked_mul(u64::from(size.1))?
            .checked_mul(3)?;
        (Some(len) == u64::try_from(attachment_len).ok()).then_some(size)
    })
}

/// A picture of a digit as the recogniser takes it: 8 x 8 values from 0 (paper) to 16 (ink). The
/// paper may be light or dark; it is what most of the picture is.
pub fn digit_of_png(input: impl BufRead + Seek) -> Result<Vec<u8>, Error> {
    let mut decoder = png::Decoder::new(input);
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info()?;
    let (width, height) = reader.info().size();
    let pixels = u64::from(width) * u64::from(height);
    let side = u32::try_from(DIGIT_SIDE).unwrap_or(u32::MAX);
    let Some(len) = reader.output_buffer_size().filter(|_| pixels <= PIXELS_MAX) else {
        return Err(Error::Size { width, height });
    };
    if width < side || height < side {
        return Err(Error::Size { width, height });
    }
    let mut bytes = vec![0; len];
    let frame = reader.next_frame(&mut bytes)?;
    let samples = frame.color_type.samples();
    let colours = if samples >= 3 { 3 } else { 1 };
    let luma: Vec<u64> = bytes[..frame.buffer_size()]
        .chunks_exact(samples)
        .map(|pixel| {
            pixel[..colours]
                .iter()
                .map(|&value| u64::from(value))
                .sum::<u64>()
        })
        .collect();
    Ok(shrink(
        &luma,
        width as usize,
        height as usize,
        255 * colours as u64,
    ))
}

/// Averages `luma` over an 8 x 8 grid, as ink.
fn shrink(luma: &[u64], width: usize, height: usize, white: u64) -> Vec<u8> {
    let mean = luma.iter().sum::<u64>() / luma.len().max(1) as u64;
    let paper_is_light = mean * 2 > white;
    let cell = |row: usize, column: usize| {
        let rows = row * height / DIGIT_SIDE..(row + 1) * height / DIGIT_SIDE;
        let columns = column * width / DIGIT_SIDE..(column + 1) * width / DIGIT_SIDE;
        let count = (rows.len() * columns.len()) as u64;
        let sum: u64 = rows.flat_map(|y| &luma[y * width..][columns.clone()]).sum();
        let ink = if paper_is_light {
            white * count - sum
        } else {
            sum
        };
        u8::try_from(ink * DIGIT_MAX / (white * count)).unwrap_or(u8::MAX)
    };
    (0..DIGIT_SIDE * DIGIT_SIDE)
        .map(|at| cell(at / DIGIT_SIDE, at % DIGIT_SIDE))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_believed_only_if_the_pixels_are_there() {
        assert_eq!(size_in("tank 3 4x2 hash", 24), Some((4, 2)));
        assert_eq!(size_in("tank 3 4x2 hash", 25), None);
        assert_eq!(size_in("4294967295x4294967295", 3), None);
    }

    #[test]
    fn ink_is_found_on_light_and_dark_paper() {
        let mut picture = vec![255; 16 * 16 * 3];
        picture[..3 * 2].fill(0);
        picture[16 * 3..16 * 3 + 6].fill(0);
        let inverted: Vec<u8> = picture.iter().map(|value| 255 - value).collect();
        for pixels in [picture, inverted] {
            let mut file = Vec::new();
            write_png(&mut file, 16, 16, &pixels).unwrap();
            let digit = digit_of_png(io::Cursor::new(file)).unwrap();
            assert_eq!(digit[0], 16);
            assert!(digit[1..].iter().all(|&value| value == 0));
        }
    }

    #[test]
    fn what_is_no_picture_is_refused() {
        assert!(digit_of_png(io::Cursor::new(b"nonsense".to_vec())).is_err());
        let mut small = Vec::new();
        write_png(&mut small, 2, 2, &[0; 12]).unwrap();
        assert!(matches!(
            digit_of_png(io::Cursor::new(small)),
            Err(Error::Size { .. })
        ));
    }
}
