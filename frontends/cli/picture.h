// SPDX-License-Identifier: Apache-2.0
//
// Pictures as SVG, alone or in a page that needs nothing else.

#ifndef DSD_FRONTENDS_CLI_PICTURE_H_
#define DSD_FRONTENDS_CLI_PICTURE_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "dsd/frontends/cli/verb.h"

namespace dsd::cli {

// A different one for each of the first ten numbers, and similar ones later.
std::string ColourOf(int64_t number);

// Pixels, from the upper left corner.
struct Area {
  double x = 0;
  double y = 0;
  double width = 0;
  double height = 0;
};

struct Stroke {
  absl::string_view colour = "none";
  double width = 1;
};

enum class Anchor { kStart, kMiddle, kEnd };
struct Font {
  double size = 12;
  bool bold = false;
  absl::string_view colour = "#222";
  Anchor anchor = Anchor::kStart;
  bool halo = false;  // readable on any colour
};

class Picture {
 public:
  Picture(double width, double height) : width_(width), height_(height) {}

  // `hint` is shown when the mouse is over it. Texts are escaped here.
  void AddBox(const Area& area, absl::string_view fill,
              absl::string_view hint = "", const Stroke& stroke = {});

  // `y` is the base line. Cut with an ellipsis where it is wider than `room`,
  // by estimate.
  void AddText(double x, double y, absl::string_view text, double room,
               const Font& font = {});

  // Width of the text in pixels, by estimate.
  static double WidthOf(absl::string_view text, double font_size);

  std::string Svg() const;
  std::string Html(absl::string_view title) const;

 private:
  std::string Elements(absl::string_view attributes) const;

  const double width_;
  const double height_;
  std::string body_;
};

// Writes it to `path`, replacing what is there: a page if the name ends with
// .html or .htm, else SVG. "-" is context.out. Errors: of files; what was there
// stays.
absl::Status WritePicture(const Picture& picture, absl::string_view title,
                          const std::string& path, Context& context);

}  // namespace dsd::cli

#endif  // DSD_FRONTENDS_CLI_PICTURE_H_
